"""The promises of the README put to the test: kills, damage, hostile files, full disks. `make soak` runs all of it."""
