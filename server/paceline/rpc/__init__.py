"""The gRPC outside: KServe v2, paceline.v1, health and reflection on one port."""
