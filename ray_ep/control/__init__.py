"""See a run and steer it from outside: a gRPC service on the driver (v1/control.proto), and its client."""
