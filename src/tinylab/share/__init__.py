"""Pictures in; ONNX, model card and report out."""
