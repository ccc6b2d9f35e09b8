"""What users take from a run: predictions on pictures, an ONNX file, a model card, an HTML page.

Others use `predict.load` and `predict`, `picture.read_image`, `onnx.export_onnx`,
`card.write_hand_over` and `report.page`.
"""
