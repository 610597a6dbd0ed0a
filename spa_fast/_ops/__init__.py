"""Registration of the operators with torch.library: schema, implementation, fake, autograd."""
