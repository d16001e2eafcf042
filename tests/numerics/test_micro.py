"""What pretraining computes in its own, faster way is what diffusers computes; and it can go on."""

import pytest
import torch

from tools.micro import dit, measure, models, pretrain, vae
from tools.micro.checkpoint import resume, save
from wanlora.micro import world

CAPTION = "a striped purple square moving right on a white background"


@pytest.fixture(scope="module")
def autoencoder():
    made = models.make_vae()
    vae.initialise(made, seed=0)
    noise = torch.Generator().manual_seed(0)
    for parameter in made.parameters():  # no weight may be at a value that hides a mistake
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    return made.eval()


@pytest.mark.parametrize("num_frames", [1, 5, 13])
@torch.no_grad()
def test_a_whole_clip_at_once_is_what_diffusers_does_in_parts(autoencoder, num_frames):
    frames = (
        torch.rand(1, 3, num_frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )
    posterior = autoencoder.encode(frames).latent_dist
    mean, logvar = vae.encode(autoencoder, frames)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-4)
    rebuilt = vae.decode(autoencoder, mean)
    expected = autoencoder.decode(mean).sample
    torch.testing.assert_close(rebuilt.clamp(-1, 1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_that_stands_for_the_padding_changes_nothing():
    torch.manual_seed(0)
    transformer, text = models.make_transformer().eval(), models.make_text_encoder(0)
    embeds = dit.embed(text, [CAPTION, ""])
    whole = torch.zeros(2, models.ROW.shape.num_text_tokens, models.ROW.shape.text_dim)
    whole[:, : dit.TEXT_ROWS] = embeds
    latents, noise = torch.randn(2, 2, models.ROW.vae.z_dim, 2, 4, 4)
    sigmas = torch.tensor([0.3, 0.8])
    expected = dit.loss_at(transformer, latents, whole, noise, sigmas)
    dit.shorten_text(transformer)
    found = dit.loss_at(transformer, latents, embeds, noise, sigmas)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_step_of_either_model_stays_on_its_device():
    """The meta device computes nothing, and refuses to meet a tensor of the CPU."""
    autoencoder, transformer = models.make_vae().to("meta"), models.make_transformer().to("meta")
    frames = torch.zeros(1, 3, 5, 16, 16, device="meta")
    noise = torch.Generator()
    assert vae.loss(autoencoder, frames, frames[:, :1], noise).device.type == "meta"
    dit.shorten_text(transformer)
    rows = torch.zeros(2, dit.TEXT_ROWS, models.ROW.shape.text_dim)
    clips = dit.Clips(torch.zeros(2, models.ROW.vae.z_dim, 2, 4, 4), rows, rows[0])
    value = dit.step_loss(transformer, clips, batch=2, seed=0, step=0)
    assert value.device.type == "meta"


def test_a_pretraining_that_was_stopped_ends_with_the_same_weights(tmp_path, monkeypatch):
    schedule = vae.Schedule((vae.Phase(1, 8, 2, 2), vae.Phase(5, 8, 1, 2)))
    monkeypatch.setattr(vae, "POOL_PER_CONCEPT", 1)
    monkeypatch.setattr(vae, "SAVE_EVERY", 2)

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    def trained(folder):
        model = models.make_vae()
        vae.initialise(model, seed=0)
        vae.train(model, schedule, folder / "vae.pt", seed=0)
        return model.state_dict()

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(vae, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(parts)
    expected = trained(whole)
    for name, tensor in trained(parts).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_recipe_trains_each_stage_on_from_the_one_before(tmp_path, monkeypatch):
    """All of `make micro` except the figures, with one or two steps of each part."""
    stages = [dit.Stage(number, 2, 2, 1e-2, 1e-2, 0.5, 0.5) for number in (1, 2)]
    monkeypatch.setattr(vae, "SCHEDULE", vae.Schedule((vae.Phase(1, 8, 1, 1),)))
    monkeypatch.setattr(vae, "POOL_PER_CONCEPT", 1)
    monkeypatch.setattr(dit, "STAGES", stages)
    monkeypatch.setattr(pretrain, "CLIPS_PER_CONCEPT", 2)
    started = []
    train = dit.train

    def noted(transformer, clips, *rest):
        weight = transformer.proj_out.weight.detach()
        started.append((len(clips.latents), weight.clone()))
        averaged = train(transformer, clips, *rest)
        started.append((None, averaged.proj_out.weight.detach().clone()))
        return averaged

    def stop(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(dit, "train", noted)
    monkeypatch.setattr(measure, "measure", stop)
    for _ in range(2):  # the second time everything is trained already
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(tmp_path / "work", tmp_path / "model", torch.device("cpu"))
    first, first_end, second, second_end, *again = started
    known = len(world.KNOWN)
    assert (first[0], second[0]) == (known, 2 * known)
    assert torch.equal(second[1], first_end[1])
    assert not torch.equal(second_end[1], first_end[1])
    assert torch.equal(again[-1][1], second_end[1])
    assert (tmp_path / "model" / "model_index.json").exists()


def test_a_stage_has_the_first_clips_of_each_concept():
    known = len(world.KNOWN)
    rows = torch.arange(known * 3).float()[:, None]
    chosen = pretrain.first_clips(dit.Clips(rows, rows, rows[0]), 2)
    assert chosen.latents.flatten().tolist() == [3.0 * k + i for k in range(known) for i in (0, 1)]


def test_a_checkpoint_that_is_not_there_is_step_zero(tmp_path):
    layer = torch.nn.Linear(2, 2)
    assert resume(tmp_path / "none.pt", {"layer": layer}) == 0
    save(tmp_path / "some.pt", {"layer": layer}, 7)
    assert resume(tmp_path / "some.pt", {"layer": torch.nn.Linear(2, 2)}) == 7
