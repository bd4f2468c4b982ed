"""What a run will need before it runs: memory per rank, bytes on the wire, tokens per second."""
