"""The data set: downloaded, checked, decoded once, split, augmented, served in batches.

Others use `dataset.prepare` and `open_dataset`, `split.make_split`, `loader.make_loader` and
`evaluation_batches`, `augment.normalise` and `network_input`, `picture.read_image`,
`synthetic.write_sample`, and `TinyImageNet`.
"""


def __getattr__(name: str) -> object:
    if name != "TinyImageNet":
        raise AttributeError(name)
    from tinylab.data.tiny_imagenet import TinyImageNet  # only now, as it needs torch

    return TinyImageNet
