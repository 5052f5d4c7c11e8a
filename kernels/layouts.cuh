/* Where scales lie (arfusion_pass/ops/layouts.py is the reference), and the zeros in their padding.
 *
 * Token and group numbers are the whole tensor's, whatever piece of it a launch works on. */
#pragma once
#include "formats.cuh"

namespace arf {

/* Byte offset of the word that holds groups 4k to 4k + 3 of a row, in the swizzled and packed layouts. */
ARF_DEVICE uint64_t word_offset(const Params& p, uint64_t row, uint32_t k) {
  const uint64_t tiles = (p.groups + 3) / 4;
  switch (p.quant.layout()) {
    case Layout::kSwizzled128x4:
      return (row / 128 * tiles + k) * 512 + row % 32 * 16 + row % 128 / 32 * 4;
    case Layout::kSwizzled8x4:
      return (row / 8 * tiles + k) * 32 + row % 8 * 4;
    default: /* kPackedUe8m0: words, column-major, scale_stride_g between columns */
      return (static_cast<uint64_t>(k) * p.scale_stride_g + row) * 4;
  }
}

/* Of a group's scale: an fp32 in ROW, COLUMN and COLUMN_TMA, a byte in the others. */
ARF_DEVICE void* scale_address(const Params& p, uint32_t token, uint32_t group) {
  const uint32_t t = p.first_token + token;
  switch (p.quant.layout()) {
    case Layout::kRow:
    case Layout::kColumn:
    case Layout::kColumnTma:
      return static_cast<float*>(p.scale_out) + (static_cast<uint64_t>(t) * p.scale_stride_t +
                                                 static_cast<uint64_t>(group) * p.scale_stride_g);
    case Layout::kLinear: return static_cast<uint8_t*>(p.scale_out) + (static_cast<uint64_t>(t) * p.groups + group);
    default: return static_cast<uint8_t*>(p.scale_out) + (word_offset(p, t, group / 4) + group % 4);
  }
}

/* To an address that the compiler has lost sight of (Epilogue::scale_place), which would else be a store to any memory space. */
ARF_DEVICE void store_byte(void* global, uint32_t byte) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(global), "r"(byte) : "memory"); /* the low byte */
}
ARF_DEVICE void store_float(void* global, float x) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(global), "f"(x) : "memory"); /* *global = x */
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
    /* Chunk j of 16 bytes of a tile of 128 rows holds rows r, r + 32, r + 64, r + 96, with r = j mod 32. */
    const uint32_t tile = first / 128, chunks = padding ? words * 32 : 0;
    uint4* const at = static_cast<uint4*>(p.scale_out) + static_cast<uint64_t>(tile) * chunks;
    const uint32_t row = tile * 128 + static_cast<uint32_t>(i) % 32; /* of all this thread's chunks: n is a multiple of 32 */
    for (uint32_t j = static_cast<uint32_t>(i); j < chunks; j += static_cast<uint32_t>(n)) {
      uint32_t* const word = reinterpret_cast<uint32_t*>(at + j);
      if (row >= first) {
        at[j] = make_uint4(0, 0, 0, 0);
      } else {
        if (row + 32 >= first) word[1] = 0;
        if (row + 64 >= first) word[2] = 0;
        if (row + 96 >= first) word[3] = 0;
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
