import pytest
import torch

from pusa.backbones.mochi import PusaMochiTransformer3DModel


def inputs(batch=3, frames=4, tokens=8, width=16):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(tokens)[None] < torch.tensor([5, 8, 2])[:batch, None]
    return {
        "hidden_states": torch.randn(batch, 12, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, width, generator=generator),
        "encoder_attention_mask": mask,
    }


@torch.no_grad()
def run(model, timestep, **given):
    return model(timestep=timestep, **given).sample


T_B = torch.tensor([100.0, 500.0, 900.0])


def test_equal_levels_are_the_base_model(networks):
    base, pusa = networks
    expected = run(base, T_B, **inputs())
    assert expected.std() > 0.1
    torch.testing.assert_close(run(pusa, T_B, **inputs()), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(pusa, T_B[:, None].expand(3, 4), **inputs()), expected, atol=1e-5, rtol=0)


def test_each_frame_has_its_own_level(networks):
    _, pusa = networks
    equal = T_B[:, None].repeat(1, 4)
    changed = equal.clone()
    changed[:, 2] += 400
    effect = run(pusa, changed, **inputs()) - run(pusa, equal, **inputs())
    difference = effect.abs().mean((0, 1, 3, 4))
    assert difference.argmax() == 2
    assert difference[2] > 1.5 * difference[[0, 1, 3]].max()


def test_a_batch_gives_each_sample_what_it_gets_alone(networks):
    _, pusa = networks
    t_BF = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) * 1000
    together = run(pusa, t_BF, **inputs())
    for i in range(3):
        alone = run(pusa, t_BF[i : i + 1], **{name: value[i : i + 1] for name, value in inputs().items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_padding_of_the_text_changes_nothing(networks):
    _, pusa = networks
    given = inputs()
    expected = run(pusa, T_B, **given)
    noise = torch.where(given["encoder_attention_mask"][..., None], 0.0, 100.0)
    given["encoder_hidden_states"] = given["encoder_hidden_states"] + noise
    torch.testing.assert_close(run(pusa, T_B, **given), expected, atol=1e-5, rtol=0)


def test_no_valid_text_at_all_is_allowed(networks):
    base, pusa = networks
    given = inputs()
    given["encoder_attention_mask"] = torch.zeros_like(given["encoder_attention_mask"])
    torch.testing.assert_close(run(pusa, T_B, **given), run(base, T_B, **given), atol=1e-5, rtol=0)


def test_gradients_match_finite_differences(networks):
    _, pusa = networks
    pusa = pusa.double()
    given = {name: value.double() if value.is_floating_point() else value for name, value in inputs(1, 2).items()}
    given["hidden_states"] = given["hidden_states"][..., :2, :2]
    timestep = torch.tensor([[100.0, 700.0]], dtype=torch.float64)
    bias = pusa.transformer_blocks[0].norm1.linear.bias
    weights = torch.randn(given["hidden_states"].shape, dtype=torch.float64)

    def loss():
        return (pusa(timestep=timestep, **given).sample.double() * weights).sum()

    loss().backward()
    step = 1e-2  # the norms work in fp32, whatever the model does: a smaller step drowns
    for index in (0, 17, 40):
        with torch.no_grad():
            bias[index] += step
            above = loss()
            bias[index] -= 2 * step
            below = loss()
            bias[index] += step
        assert ((above - below) / (2 * step)).item() == pytest.approx(bias.grad[index].item(), rel=0.02, abs=1e-3)


def test_gradient_checkpointing_changes_nothing(networks):
    _, pusa = networks
    t_BF = torch.full((3, 4), 300.0)
    plain = torch.autograd.grad(pusa(timestep=t_BF, **inputs()).sample.square().mean(), pusa.proj_out.weight)[0]
    pusa.enable_gradient_checkpointing()
    again = torch.autograd.grad(pusa.train()(timestep=t_BF, **inputs()).sample.square().mean(), pusa.proj_out.weight)[0]
    torch.testing.assert_close(again, plain)


def test_saved_and_loaded_it_is_the_same(networks, tmp_path):
    _, pusa = networks
    pusa.save_pretrained(tmp_path)
    loaded = PusaMochiTransformer3DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded, T_B, **inputs()), run(pusa, T_B, **inputs()), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, 4, 1)])
def test_a_timestep_of_another_shape_is_refused(networks, shape):
    with pytest.raises(ValueError, match=r"allowed are \(3,\) and \(3, 4\)"):
        run(networks[1], torch.ones(shape), **inputs())
