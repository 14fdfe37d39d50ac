"""What is read off a model's classes."""

from collections import OrderedDict

import torch
from torch import nn

from lowland._layers import has_hooks, is_as_inherited, is_plain_sequence, walk


def test_a_walk_gives_the_names_that_pytorch_gives_and_repeated_layers_again():
    layer = nn.Linear(2, 2)
    inner = nn.Sequential(OrderedDict(first=layer, second=nn.Tanh()))
    model = nn.Sequential(inner, layer, layer)
    assert [path for path, _ in walk(model)] == ["", "0", "0.first", "0.second", "1", "2"]
    named = dict(model.named_modules(remove_duplicate=False))
    assert all(named[path] is module for path, module in walk(model))


def test_other_modules_are_not_gone_into():
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(2 * x)

    model = Own(nn.Linear(2, 2))
    assert not is_plain_sequence(model)
    assert [module for _, module in walk(nn.Sequential(model))][1:] == [model]
    assert not is_as_inherited(model, nn.Sequential)


def test_whatever_may_change_an_output_is_a_hook():
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = layer.register_forward_pre_hook(lambda module, inputs: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)
    layer.forward = torch.zeros_like
    assert has_hooks(layer)
