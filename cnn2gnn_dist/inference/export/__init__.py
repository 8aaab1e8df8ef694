"""A model as files that run without this package: ONNX graphs, programs of torch.export."""
