"""A prompt on its way to being used: encoded once, then its cross-attention K/V computed by every stage."""

from __future__ import annotations

from collections.abc import Mapping

from services.scheduler.core import PipelineCore
from services.scheduler.messenger import Messenger, RefusedError, all_of
from services.scheduler.records import StreamRecord
from services.scheduler.settings import Settings
from shared.bus.port import Bus, BusError
from shared.contracts import subjects
from shared.contracts.commands import PreparePrompt, PromptPart, TextEncode
from shared.engine.plan.prompts import digest, mix_digest, mix_text
from shared.session.port import SessionStore
from shared.session.state import Owner


class Prompting:
    """Prepares prompt versions. ``cores`` are the pipelines by name: they know which older versions are still read."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        store: SessionStore,
        messenger: Messenger,
        cores: Mapping[str, PipelineCore],
    ) -> None:
        self._settings, self._bus, self._store = settings, bus, store
        self._messenger, self._cores = messenger, cores

    async def prepare(self, record: StreamRecord, prompt: str, parts: tuple[PromptPart, ...] = ()) -> int:
        """Make ``prompt``, or a mix of ``parts``, usable by every stage. Returns its version.

        Raises RefusedError; the stream's prompt stays then.
        """
        pairs = [(part.text, part.weight) for part in parts]
        wanted = mix_digest(record.spec.model, pairs) if pairs else digest(record.spec.model, prompt)
        try:
            encoded = await self._bus.request(
                subjects.TEXT_ENCODE,
                TextEncode(model=record.spec.model, prompt=prompt, parts=parts),
                self._settings.answer_timeout_s,
            )
        except BusError as error:
            raise RefusedError(f"no worker encoded the prompt: {error}") from None
        if encoded.error is not None:
            raise RefusedError(f"the prompt could not be encoded: {encoded.error}")
        if encoded.digest != wanted:
            raise RefusedError("the text worker answered for another prompt")
        version = record.prompts.prepare(encoded.digest, len(record.workers))
        await all_of(*(self._prepare_stage(record, stage, version) for stage in range(len(record.workers))))
        record.prompts.require(version)
        # Only now: a prompt that was refused is not what the stream shows.
        shown = mix_text(pairs) if pairs else prompt
        record.parts = parts
        kept = {"prompt": shown, "prompt_version": version, "prompts": [part.model_dump() for part in parts]}
        await self._store.put(record.stream, Owner.SCHEDULER, kept)
        return version

    async def _prepare_stage(self, record: StreamRecord, stage: int, version: int) -> None:
        core = self._cores.get(record.pipeline)
        queue = core.streams.get(record.stream) if core is not None else None
        used = {version} if queue is None else {version, *queue.prompts_used}
        oldest = min(used)
        record.prompts.retire_before(oldest)
        instance = record.workers[stage]
        key = ("prompt", record.stream, str(record.epoch), str(version), str(stage))
        message = PreparePrompt(
            instance=instance,
            stream=record.stream,
            epoch=record.epoch,
            version=version,
            digest=record.prompts.digest_of(version),
            oldest=oldest,
        )
        await self._messenger.ask("worker", message, f"{instance} did not prepare the prompt in time", key)
        record.prompts.stage_ready(version, stage)
