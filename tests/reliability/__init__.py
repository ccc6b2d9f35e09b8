"""Kills, damage, full disks: docs/reliability.md put to the test. `make soak` runs all of it."""
