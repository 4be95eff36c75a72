"""Egress: paces frames, steadies them along their source's motion, feeds the sinks, is the one closer of the ledger.

In:  ``rheo.egress.assign`` (TakeStream, LeaveStream, ChangeSinks), ``rheo.stream.<id>.chunk`` (ChunkCaptured,
     SourceEnded), ``rheo.stream.<id>.audio`` (AudioCaptured), ``rheo.stream.<id>.frames`` (FramesDecoded, ChunkDropped),
     ``rheo.stream.<id>.looking`` (Looking).
Out: ``rheo.stream.<id>.closed`` (ChunkClosed), ``rheo.stream.<id>.event`` (applied, stopped, failed, warning),
     ``rheo.stream.<id>.out`` (FramePublished), ``rheo.taken``.

Failure policy. Live: what has not been seen 2 s after its deadline is dropped(egress:lost), and the last picture stands.
Lossless: a gap that is not filled, or an end that does not come, fails the run loudly, with the file finished up to
there. A recording from the start that breaks (disk full)
fails the stream; a live sink that breaks costs itself alone. The ledger is written to the session store chunk by chunk: a
restarted egress goes on from it, keeps what its predecessor recorded, and can close a stream that it never saw. Whatever
happens, every input frame ends with exactly one verdict.
"""
