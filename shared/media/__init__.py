"""Media helpers that several services share: probing a file, the audio track header, salvaging a recording, safe paths."""
