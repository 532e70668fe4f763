"""Weights of other systems: files of torch and safetensors, published names and layouts."""
