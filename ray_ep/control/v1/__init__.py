"""The messages of control.proto. control_pb2 is generated: `make proto`."""
