"""Put the README's promises to the test: kills, damage, full disks. `make soak` runs all of it."""
