"""The data set: downloaded, checked, decoded once, split, augmented, served in batches.

Others use `dataset.prepare` and `open_dataset`, `split.make_split`, `loader.make_loader` and
`evaluation_batches`, `augment.normalise` and `network_input`, `synthetic.write_sample`.
"""
