"""What a run leaves on disk: its folder, its checkpoints, its weights, where it was computed.

Others use `folder.Run` and `default_folder`, `verify.verify_run`, `checkpoint.save` and `load`,
`environment.choose`, `weights.load_weights`.
"""
