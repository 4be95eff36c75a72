"""The scheduler under a virtual clock: its own decision code, synthetic workers, thousands of streams in seconds.

What decides is what runs in the service: the pipeline core with its batching and cost model, admission, ladder, placement
and re-balancing. What is synthetic: workers (a device profile's times with noise, stragglers, stalls and losses), sources
(open-loop sessions whose chunks come at their rate, as ingest numbers them) and players (egress' playout and its ledger's
rules, chunk by chunk). Nothing waits and nothing is random but by the scenario's seed, so a run is repeated to the last figure.

Run by ``rheocast simulate``, which launches ``python -m services.scheduler.simulator`` (ADR 16).
"""
