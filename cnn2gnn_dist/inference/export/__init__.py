"""A model as files that answer without this package: ONNX graphs, programs of torch.export."""
