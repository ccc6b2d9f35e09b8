"""The data set: downloaded, checked, decoded once, split, augmented, served in batches.

Others use `dataset.prepare` and `open_dataset`, `split.make_split`, `loader.make_loader` and
`evaluation_batches`, `augment.normalise` and `network_input`, `picture.read_image`,
`synthetic.write_sample`, and `TinyImageNet`.
"""


def __getattr__(name: str) -> object:
    """Load `TinyImageNet` when it is asked for: the rest does without torch."""
    if name != "TinyImageNet":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tinylab.data.tiny_imagenet import TinyImageNet

    return TinyImageNet
