"""From a recipe to a finished run.

Others use `train.train`, `optim.schedule`, `lr_finder.find_lr`, `evaluate.test_logits` and `score`,
`step.new_state` and `train_step`.
"""
