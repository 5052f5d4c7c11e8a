/* Where scales lie (arfusion_pass/ops/layouts.py is the reference), and the zeros in their padding.
 *
 * Token and group numbers are the whole tensor's, whatever piece of it a launch works on. */
#pragma once
#include "formats.cuh"

namespace arf {

/* ROW, COLUMN, COLUMN_TMA: fp32. */
ARF_DEVICE void store_scale(const Params& p, uint32_t token, uint32_t group, float scale) {
  const uint64_t t = p.first_token + token;
  static_cast<float*>(p.scale_out)[t * p.scale_stride_t + group * p.scale_stride_g] = scale;
}

/* Byte offset of the word that holds groups 4k to 4k + 3 of a row, in the swizzled and packed layouts. */
ARF_DEVICE uint64_t word_offset(const Params& p, uint64_t row, uint32_t k) {
  const uint64_t tiles = (p.groups + 3) / 4;
  switch (p.quant.layout()) {
    case Layout::kSwizzled128x4:
      return (row / 128 * tiles + k) * 512 + row % 32 * 16 + row % 128 / 32 * 4;
    case Layout::kSwizzled8x4:
      return (row / 8 * tiles + k) * 32 + row % 8 * 4;
    default: /* kPackedUe8m0: words, column-major, scale_stride_g between columns */
      return (k * p.scale_stride_g + row) * 4;
  }
}

/* PACKED_UE8M0, SWIZZLED_*, LINEAR: one byte. */
ARF_DEVICE void store_scale_byte(const Params& p, uint32_t token, uint32_t group, uint32_t byte) {
  const uint64_t t = p.first_token + token;
  const uint64_t at =
      p.quant.layout() == Layout::kLinear ? t * p.groups + group : word_offset(p, t, group / 4) + group % 4;
  static_cast<uint8_t*>(p.scale_out)[at] = static_cast<uint8_t>(byte);
}

/* Rows of a padded layout's storage. */
ARF_DEVICE uint32_t padded_rows(const Params& p) {
  const uint32_t to = p.quant.layout() == Layout::kSwizzled128x4 ? 127 : p.quant.layout() == Layout::kSwizzled8x4 ? 7 : 3;
  return (p.total_tokens + to) & ~to;
}

/* All padding of the tensor, by the launch that has its last token; thread i of n. Called between push and poll, where
 * nobody waits for it: at one token NVFP4's 128x4 layout has 127 times more padding than scales. */
ARF_DEVICE void write_padding(const Params& p, uint64_t i, uint64_t n) {
  const uint32_t rows = padded_rows(p), first = p.total_tokens, padding = rows - first;
  const uint32_t words = (p.groups + 3) / 4;
  uint8_t* bytes = static_cast<uint8_t*>(p.scale_out);
  const Layout layout = p.quant.layout();
  if (layout == Layout::kColumnTma) {
    const uint32_t columns = p.groups - !p.pad_last;
    for (uint64_t j = i; j < static_cast<uint64_t>(columns) * padding; j += n) {
      static_cast<float*>(p.scale_out)[j / padding * p.scale_stride_g + first + j % padding] = 0.0f;
    }
    return;
  }
  /* Rows past the last token: whole words. */
  if (layout == Layout::kSwizzled128x4) {
    /* Chunks of 16 bytes hold rows r, r + 32, r + 64, r + 96 of a tile of 128. */
    const uint32_t tile = first / 128;
    const uint64_t chunks = padding ? static_cast<uint64_t>(words) * 32 : 0;
    for (uint64_t j = i; j < chunks; j += n) {
      const uint32_t row = tile * 128 + j % 32;
      uint8_t* at = bytes + word_offset(p, row, j / 32);
      if (row >= first) {
        *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
      } else {
#pragma unroll
        for (int q = 1; q < 4; ++q) {
          if (row + 32 * q >= first) reinterpret_cast<uint32_t*>(at)[q] = 0;
        }
      }
    }
  } else {
    const uint32_t columns = words - (layout == Layout::kPackedUe8m0 && !p.pad_last);
    for (uint64_t j = i; j < static_cast<uint64_t>(columns) * padding; j += n) {
      *reinterpret_cast<uint32_t*>(bytes + word_offset(p, first + j % padding, j / padding)) = 0;
    }
  }
  /* Groups past the last one of the tokens' own rows: the end of each row's last word. */
  if (p.groups % 4) {
    for (uint64_t row = i; row < first; row += n) {
      for (uint32_t b = p.groups % 4; b < 4; ++b) bytes[word_offset(p, row, words - 1) + b] = 0;
    }
  }
}

}  // namespace arf
