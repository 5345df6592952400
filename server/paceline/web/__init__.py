"""HTTP beside gRPC: metrics, health for load balancers, and a status page for people."""
