from gla_test_base import GLATestBase


class TestReference(GLATestBase):
    implementation = "reference"
