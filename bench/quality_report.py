"""What :mod:`bench.quality` found, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.quality import Quality


def report(quality: Quality) -> str:
    """Markdown: one table per part that was measured."""
    lines = [
        f"{quality.model} at {quality.width}×{quality.height}, {quality.steps} steps, s0 {quality.s0}, "
        f"{quality.frames} frames of {', '.join(quality.clips)}"
    ]
    if quality.styles:
        alone = ", ".join(f"{name} {db:.1f}" for name, db in quality.autoencoder_db.items())
        lines += [
            "",
            f"autoencoder alone {alone} dB; no style {quality.no_style_db:.1f} dB; "
            f"below the ceiling {quality.below_ceiling_db:.1f} dB on average, {quality.most_below_ceiling_db:.1f} at most "
            f"({quality.made_below_ceiling_db:.1f} and {quality.made_most_below_ceiling_db:.1f} not steadied); "
            f"nearest to its own style {quality.nearest:.1%} of frames",
            "",
            f"| style | prompt | dB to the true filter | ceiling | below | {' | '.join(quality.clips)} | not steadied "
            "| nearest | else taken for |",
            f"| {' | '.join(['---'] * (8 + len(quality.clips)))} |",
        ]
        lines += [
            f"| {s.style} | {s.prompt} | {s.db:.1f} | {s.ceiling_db:.1f} | {s.ceiling_db - s.db:.1f} "
            f"| {' | '.join(f'{s.below_by_clip[name]:.1f}' for name in quality.clips)} "
            f"| {s.ceiling_db - s.made_db:.1f} | {s.nearest:.0%} "
            f"| {s.mistaken_for or '–'} |"
            for s in quality.styles
        ]
    if quality.temporal:
        lines += [
            "",
            "| warp error | shown | true filter | ratio | not steadied | per frame | ratio to that |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {w.style} | {w.shown:.4f} | {w.true_filter:.4f} | {w.shown / w.true_filter:.2f} "
            f"| {w.made:.4f} | {w.per_frame:.4f} | {w.shown / w.per_frame:.2f} |"
            for w in quality.temporal
        ]
    if quality.motion:
        lines += ["", "| clip | style | noise | fast motion, dB | still picture, flicker |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {m.clip} | {m.style} | {m.noise} | {m.fast_db:.2f} | {m.still_flicker:.4f} |" for m in quality.motion
        ]
    if quality.prompts:
        lines += [
            "",
            "| change | blend, chunks | new style leads after chunks | broken frames | usual / worst dB to the nearest mix "
            "| largest jump |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {c.before} → {c.after} | {c.blend_chunks} | {c.chunks_until or 'never'} | {c.broken} "
            f"| {c.usual_db:.1f} / {c.worst_db:.1f} | {c.largest_jump:.2f} |"
            for c in quality.prompts
        ]
    if quality.fps:
        lines += ["", "engine: " + "; ".join(f"{name} {fps:.1f} fps" for name, fps in quality.fps.items())]
    if quality.long:
        lines += [
            "",
            f"{quality.long_minutes:g} simulated minutes, {quality.long_style}",
            "",
            "| ablation | motion | first minute, dB | worst | last | last − first |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r.ablation} | {r.motion} | {r.first_db:.2f} | {r.worst_db:.2f} | {r.last_db:.2f} "
            f"| {r.last_db - r.first_db:+.2f} |"
            for r in quality.long
        ]
    return "\n".join(lines)
