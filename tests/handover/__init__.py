"""An app that tells what a worker holds, for tests of requests that go from one to another."""
