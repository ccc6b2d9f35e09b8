"""What a run leaves on disk, and where it was computed."""
