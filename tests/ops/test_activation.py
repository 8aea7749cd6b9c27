import pytest

from tests.ops.agree import DTYPES, agree, drawn
from trimaran.ops.activation import relu2, relu2_reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_relu(dtype):
    agree(relu2, relu2_reference, drawn(3, 63, 20, dtype=dtype, seed=1))
    agree(lambda x: relu2(x.detach()) + x, lambda x: relu2_reference(x.detach()) + x, drawn(63, dtype=dtype, seed=2))
