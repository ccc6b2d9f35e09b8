"""What a finished run gets wrong, and where its network looks."""
