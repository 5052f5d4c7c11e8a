/* The library's own account of its ops and constants, for the tests that compare them with the Python side. */
#include "params.h"

#define ARF_STRING_(...) #__VA_ARGS__
#define ARF_STRING(...) ARF_STRING_(__VA_ARGS__)

#define ARF_EPILOGUE                                                                                                  \
  "Tensor? residual, Tensor? weight, Tensor? scale, str group_name, float epsilon=1e-6, float weight_bias=0.0, "      \
  "int flags=0, int quant=0, float quant_bound=0.0, float scale_value=1.0"
#define ARF_RARE "Tensor? addend=None, Tensor? epsilon_tensor=None, Tensor? factor=None, float factor_value=1.0, "
#define ARF_OUTPUTS                                                                                                   \
  "Tensor(a!)? allreduce_out=None, Tensor(b!)? residual_out=None, Tensor(c!)? norm_out=None, "                        \
  "Tensor(d!)? quant_out=None, Tensor(e!)? scale_out=None"

extern "C" {

const char* arf_schemas(void) {
  return "allreduce_rms_norm(Tensor x, " ARF_EPILOGUE ", *, " ARF_RARE ARF_OUTPUTS ") -> ()\n"
         "moe_reduce_allreduce_rms_norm(Tensor expert_x, Tensor expert_scale, Tensor? token_input, " ARF_EPILOGUE
         ", *, " ARF_RARE ARF_OUTPUTS ") -> ()\n"
         "moe_finalize_allreduce_rms_norm(Tensor permuted_x, Tensor index, Tensor? expert_scale, Tensor? shared, "
         "float routed_scaling_factor, " ARF_EPILOGUE ", *, " ARF_RARE ARF_OUTPUTS ") -> ()\n"
         "reduce_scatter_rms_norm_all_gather(Tensor x, " ARF_EPILOGUE ", SymInt block=0, *, " ARF_RARE ARF_OUTPUTS ") -> ()\n";
}

const char* arf_spec_constants(void) {
  using namespace arf;
  static_assert(kUnroundedSum == 1 && kRoundBeforeWeight == 2 && kOneshot == 256 && kTwoshot == 512 && kNoPdl == 1024);
  static_assert(kAddendLast == 4 && kDivideByRoot == 8 && kReciprocalRoot == 16 && kAddendScaled == 32);
  static_assert(kTriggerEarly == 2048 && kReference == 4096 && kFlashinfer == 8192 && kRecord == 16384);
  static_assert(kMoeRoundProduct == 65536 && kMoeRoundPartial == 131072 && kMoeRoundSum == 262144 && kMoeRoundScaled == 524288);
  static_assert(kSharded == 32768 && kResidualInSharded == 1048576 && kResidualOutSharded == 2097152 &&
                kOwnerBlocks == 4194304);
  return "Flags.UNROUNDED_SUM=1\nFlags.ROUND_BEFORE_WEIGHT=2\nFlags.ONESHOT=256\nFlags.TWOSHOT=512\nFlags.NO_PDL=1024\n"
         "Flags.ADDEND_LAST=4\nFlags.DIVIDE_BY_ROOT=8\nFlags.RECIPROCAL_ROOT=16\nFlags.ADDEND_SCALED=32\n"
         "Flags.TRIGGER_EARLY=2048\nFlags.REFERENCE=4096\nFlags.FLASHINFER=8192\nFlags.RECORD=16384\nFlags.SHARDED=32768\n"
         "Flags.MOE_ROUND_PRODUCT=65536\nFlags.MOE_ROUND_PARTIAL=131072\nFlags.MOE_ROUND_SUM=262144\nFlags.MOE_ROUND_SCALED=524288\n"
         "Flags.RESIDUAL_IN_SHARDED=1048576\nFlags.RESIDUAL_OUT_SHARDED=2097152\n"
         "Flags.OWNER_BLOCKS=4194304\n"
         "QuantFormat.NONE=0\nQuantFormat.FP8=1\nQuantFormat.INT8=2\nQuantFormat.NVFP4=3\nQuantFormat.MXFP8=4\n"
         "ScaleLayout.ROW=0\nScaleLayout.COLUMN=1\nScaleLayout.COLUMN_TMA=2\nScaleLayout.PACKED_UE8M0=3\n"
         "ScaleLayout.SWIZZLED_128X4=4\nScaleLayout.SWIZZLED_8X4=5\nScaleLayout.LINEAR=6\n"
         "Bound.NONE=0\nBound.AMAX=1\nBound.SCALE=2\n"
         "ScaleRule.DIVIDE=0\nScaleRule.MULTIPLY=1\nScaleRule.RECIPROCAL=2\n"
         "ScaleRound.FP32=0\nScaleRound.TENSOR=1\nScaleRound.POW2=2\nScaleRound.POW2_LOG2=3\n"
         "Apply.DIVIDE=0\nApply.RECIPROCAL=1\nApply.MULTIPLY=2\nApply.MAX_OVER_AMAX=3\n";
}

#ifdef __CUDA_ARCH_LIST__
const char* arf_architectures(void) { return ARF_STRING(__CUDA_ARCH_LIST__); }
#else
const char* arf_architectures(void) { return ""; }
#endif
}
