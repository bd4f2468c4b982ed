import copy

import torch

from distill.compress import pass_by
from tests import models


def test_a_layer_that_is_off_lets_the_hidden_state_by_and_gets_no_gradient() -> None:
    for model in (models.causal_lm("llama"), models.classifier("bert")):
        layers = model.base_model.get_submodule("layers" if model.config.model_type == "llama" else "encoder.layer")
        seen: dict[str, torch.Tensor] = {}
        layers[0].register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(entering=args[0]))
        switch = pass_by.add(layers[0], owner=3)
        layers[0].register_forward_hook(lambda _module, _args, output, seen=seen: seen.update(leaving=output))
        before = model(input_ids=models.tokens()).logits
        assert not torch.equal(seen["entering"], seen["leaving"])
        switch.kept.fill_(False)
        after = model(input_ids=models.tokens()).logits
        assert torch.equal(seen["entering"], seen["leaving"])
        assert not torch.equal(before, after)
        after.square().sum().backward()
        gradients = [parameter.grad for parameter in layers[0].parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
        assert all(parameter.grad.any() for name, parameter in layers[1].named_parameters() if name.endswith("weight"))


def test_layers_that_are_computed_again_in_the_backward_pass_go_by_as_well() -> None:
    gradients = []
    for again in (False, True):
        model = models.causal_lm("llama").train()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        pass_by.add(model.model.layers[1]).kept.fill_(False)
        model(input_ids=models.tokens(), use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_copy_has_a_switch_of_its_own_that_can_be_removed() -> None:
    model = models.causal_lm("llama")
    pass_by.add(model.model.layers[0])
    whole = model(input_ids=models.tokens()).logits
    other = copy.deepcopy(model)
    pass_by.switch_of(other.model.layers[0]).kept.fill_(False)
    assert torch.equal(model(input_ids=models.tokens()).logits, whole)
    assert not torch.equal(other(input_ids=models.tokens()).logits, whole)
    pass_by.remove(other.model.layers[0])
    assert torch.equal(other(input_ids=models.tokens()).logits, whole)
    assert other.state_dict().keys() == models.causal_lm("llama").state_dict().keys()
    pass_by.switch_of(model.model.layers[0]).kept.fill_(False)
    assert not torch.equal(model(input_ids=models.tokens()).logits, whole)
