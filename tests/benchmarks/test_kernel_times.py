"""What the sites take of a step, by the names that kernels have."""

from __future__ import annotations

from benchmarks.kernel_times import by_kind


def test_the_sites_kernels_are_told_from_the_others() -> None:
    """NCCL's all-reduce and the Triton kernel of a norm, quantiser included, are a site's without the pass; an
    all-gather, an activation and a GEMM are not."""
    times = {
        "void arf::fused_kernel<1, 2, 0, 8, false, true>(arf::Params)": 1.0,
        "void arf::sharded_kernel<1, 2, 1, 8, true>(arf::ShardedParams)": 2.0,
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": 4.0,
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": 8.0,
        "triton_red_fused__to_copy_add_clamp_div_mean_mul_pow_rsqrt_view_3": 16.0,
        "triton_poi_fused__to_copy_clamp_div_mul_silu_2": 32.0,
        "nvjet_tst_128x64_64x10_1x2_h_bz_coopB_TNT": 64.0,
    }
    assert by_kind(times) == {"fused": 3.0, "all-reduce": 4.0, "norm": 16.0, "all": 127.0}
