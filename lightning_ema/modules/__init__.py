"""What an nn.Module holds."""
