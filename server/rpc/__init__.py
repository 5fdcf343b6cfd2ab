"""KServe V2 over gRPC: the same door, facade and counts as over HTTP."""
