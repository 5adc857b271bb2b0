from gla_test_base import GLATestBase
from range_tests import NonFiniteTests, RangeTests


class TestReference(NonFiniteTests, RangeTests, GLATestBase):
    implementation = "reference"
