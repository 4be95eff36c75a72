"""Ingest: opens sources, fits and times their frames, cuts chunks, finds how they move, and publishes them.

In:  ``rheo.ingest.assign`` (TakeStream, LeaveStream), ``rheo.stream.<id>.closed`` (ChunkClosed: credits back).
Out: ``rheo.stream.<id>.chunk`` (ChunkCaptured, SourceEnded), ``rheo.stream.<id>.audio`` (AudioCaptured),
     ``rheo.stream.<id>.event`` (warning, failed), ``rheo.taken`` (StreamTaken).

Failure policy. A source that cannot be opened is refused with one line. A source that breaks later ends the stream after
what decoded of it, with the reason. Lossless: without a credit ingest waits, and fails the stream when no verdict comes
for ``stall_s``. Live: without a credit the one unnumbered chunk is overwritten with the newest frames; every frame that
this drops is counted by reason in the running totals. A restarted ingest goes on from the totals in the session store:
it reopens the source and skips what was captured before.
"""
