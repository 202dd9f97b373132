import torch
import torch.nn.functional as F

from steering.sparse_autoencoder import VisionLanguageSAE
from training.fitting.resampling import resample_dead
from training.fitting.workers import Worker
from training.sparse_step import TrainableVLSAE


def test_dead_concepts_become_badly_rebuilt_rows_and_nothing_else_changes():
    torch.manual_seed(0)
    trained = TrainableVLSAE(VisionLanguageSAE(8, 32, 3))
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    image, text = torch.randn(10, 8), torch.randn(10, 8)
    text[4] *= 1000
    trained(image, text).loss.backward()
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[5, 20]] = True
    assert resample_dead(trained, dead, image, text, optimizer, Worker(), seed=0) == 2
    cosines = F.normalize(trained.encoder_KS[dead].detach(), dim=1) @ F.normalize(text[4], dim=0)
    torch.testing.assert_close(cosines, torch.ones(2))
    assert torch.equal(trained.encoder_KS[~dead], before["encoder_KS"][~dead])
    rows = dead.repeat_interleave(2)
    assert not trained.decoder_2KS[rows].any()
    assert torch.equal(trained.decoder_2KS[~rows], before["decoder_2KS"][~rows])
    for parameter, places in ((trained.encoder_KS, dead), (trained.decoder_2KS, rows)):
        state = optimizer.state[parameter]
        assert not state["exp_avg"][places].any()
        assert not state["exp_avg_sq"][places].any()
        assert state["exp_avg_sq"][~places].any()


def test_without_dead_concepts_nothing_happens():
    trained = TrainableVLSAE(VisionLanguageSAE(8, 32, 3))
    before = trained.encoder_KS.detach().clone()
    optimizer = torch.optim.Adam(trained.parameters())
    nobody = torch.zeros(32, dtype=torch.bool)
    assert resample_dead(trained, nobody, torch.randn(4, 8), torch.randn(4, 8), optimizer, Worker(), seed=0) == 0
    assert torch.equal(trained.encoder_KS, before)
