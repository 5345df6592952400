"""HTTP/2 (RFC 9113) and gRPC's messages on it, for both sides: the server of `rpc` and the client
of `triton`."""
