"""Random calls of the public ops; `make fuzz` makes more of them."""

import fuzz
import torch


def test_random_calls():
    found = fuzz.run(2000)
    assert not found, "\n".join(found)


def test_what_a_finding_is(monkeypatch):
    """A wrong value, an error of another kind, and a message without a name are told."""

    def of_noise(number):
        function, call, valid = fuzz.call_of(0, number)
        return valid and function.__name__ == "randn_like" and call["x"].numel() > 1

    number = next(filter(of_noise, range(10_000)))
    assert fuzz.finding(0, number) is None

    def instead(function):
        call = fuzz.call_of(0, number)[1]
        function.__signature__ = fuzz.inspect.signature(fuzz.kdkernels.randn_like)
        function.__name__ = "randn_like"
        monkeypatch.setattr(fuzz, "call_of", lambda seed, number: (function, call, False))
        return fuzz.finding(0, number)

    def refusing(error):
        def function(**call):
            raise error

        return function

    assert "right" in instead(lambda x, **noise: torch.full_like(x, 9.0))
    assert instead(refusing(ValueError("x is bad"))) is None
    assert fuzz.NOT_ITS_NAME in instead(refusing(TypeError("it is bad")))
    assert instead(refusing(RuntimeError("x is bad"))).startswith("RuntimeError")
