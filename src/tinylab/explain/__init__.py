"""What a finished run gets wrong, and where it looks.

Others use `analysis.analyse_run` and `explain_answers`, `gradcam.gradcam`,
`mistakes.analyse` and `explain`, `localisation.localise` and `road.faithfulness`.
"""
