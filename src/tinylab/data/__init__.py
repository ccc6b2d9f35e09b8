"""The data set: downloaded, checked, decoded once, split, augmented, served in batches."""
