/* Decode one rectangle of a JPEG: the pixels that decoding all of it and cutting would give.

   Rows above the rectangle are entropy-decoded but not transformed, columns beside it neither,
   rows below it are not looked at. Whatever might come out otherwise (progressive or arithmetic
   coding, several scans, other colours, any warning) is left to the caller's full decoder: every
   return value but 0 says "not by me", never "corrupt".

   No global state: may be called from any number of threads at once. */

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or later is needed: older ones skip rows wrongly"
#endif

#define MARGIN_COLUMNS 16 /* chroma upsampling looks at the neighbours */
#define MARGIN_ROWS 2     /* libjpeg-turbo minds these itself; a row costs little */

enum { DONE = 0, NOT_BY_ME = 1 };

typedef struct {
  struct jpeg_error_mgr base; /* first, so that a pointer to it is one to this */
  jmp_buf leave;
} Errors;

static void leave(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->leave, 1); }

/* A warning (level -1) means damage: leave as for an error. Traces are dropped. */
static void on_message(j_common_ptr jpeg, int level) {
  if (level < 0) leave(jpeg);
}

static void be_quiet(j_common_ptr jpeg) { (void)jpeg; }

static int is_restart(int marker) { return marker >= JPEG_RST0 && marker <= JPEG_RST0 + 7; }

/* Whether a file's rest, from inside its entropy-coded data, runs to the end marker without another
   marker, except restarts where the file has them. Sees most damage below the rectangle. */
static int rest_is_sound(const uint8_t *at, const uint8_t *end, int restarts) {
  while ((at = memchr(at, 0xFF, (size_t)(end - at))) != NULL) {
    if (++at == end) return 0;
    if (*at == JPEG_EOI) return at + 1 == end;
    if (*at == 0xFF) continue; /* fill bytes: the second one may begin the marker */
    if (*at != 0 && !(restarts && is_restart(*at))) return 0;
    ++at;
  }
  return 0;
}

static int decodable(const struct jpeg_decompress_struct *jpeg, uint32_t high, uint32_t wide) {
  int colours = jpeg->jpeg_color_space == JCS_YCbCr || jpeg->jpeg_color_space == JCS_RGB;
  int grey = jpeg->jpeg_color_space == JCS_GRAYSCALE;
  return jpeg->image_height == high && jpeg->image_width == wide && jpeg->data_precision == 8 &&
         !jpeg->progressive_mode && !jpeg->arith_code &&
         jpeg->comps_in_scan == jpeg->num_components &&
         ((jpeg->num_components == 3 && colours) || (jpeg->num_components == 1 && grey));
}

static void read_rectangle(struct jpeg_decompress_struct *jpeg, uint32_t top, uint32_t left,
                           uint32_t high, uint32_t wide, uint8_t *out) {
  JDIMENSION first = left > MARGIN_COLUMNS ? left - MARGIN_COLUMNS : 0;
  JDIMENSION last = left + wide + MARGIN_COLUMNS;
  JDIMENSION above = top > MARGIN_ROWS ? top - MARGIN_ROWS : 0;
  if (last > jpeg->output_width) last = jpeg->output_width;
  JDIMENSION columns = last - first;
  if (columns < jpeg->output_width)
    jpeg_crop_scanline(jpeg, &first, &columns); /* moves first to the left */
  if (first > left || left - first + wide > columns) leave((j_common_ptr)jpeg);
  JSAMPARRAY row = (*jpeg->mem->alloc_sarray)((j_common_ptr)jpeg, JPOOL_IMAGE, columns * 3, 1);
  if (above && jpeg_skip_scanlines(jpeg, above) != above) leave((j_common_ptr)jpeg);
  while (jpeg->output_scanline < top)
    if (jpeg_read_scanlines(jpeg, row, 1) != 1) leave((j_common_ptr)jpeg);
  for (; high; --high, out += (size_t)wide * 3) {
    if (jpeg_read_scanlines(jpeg, row, 1) != 1) leave((j_common_ptr)jpeg);
    memcpy(out, row[0] + (size_t)(left - first) * 3, (size_t)wide * 3);
  }
}

/* Whether what lies below the rectangle is sound, as far as that is cheap to tell. */
static int ends_well(struct jpeg_decompress_struct *jpeg, const uint8_t *end) {
  if (jpeg->unread_marker == JPEG_EOI) { /* no more to come than a few bits: see if they do */
    JDIMENSION columns = jpeg->output_width;
    JSAMPARRAY row = (*jpeg->mem->alloc_sarray)((j_common_ptr)jpeg, JPOOL_IMAGE, columns * 3, 1);
    while (jpeg->output_scanline < jpeg->output_height)
      if (jpeg_read_scanlines(jpeg, row, 1) != 1) return 0;
  }
  if (jpeg->output_scanline == jpeg->output_height)
    return jpeg_finish_decompress(jpeg); /* reads to the end marker */
  return (!jpeg->unread_marker || is_restart(jpeg->unread_marker)) &&
         rest_is_sound(jpeg->src->next_input_byte, end, jpeg->restart_interval != 0);
}

/* Write rows [top, top + high) and columns [left, left + wide) of a JPEG whose size is known to be
   image_high x image_wide as RGB into out, high * wide * 3 bytes. 0: done; else out is undefined. */
int cnn2gnn_crop(const uint8_t *data, size_t size, uint32_t image_high, uint32_t image_wide,
                 uint32_t top, uint32_t left, uint32_t high, uint32_t wide, uint8_t *out) {
  if (!high || !wide || image_high > JPEG_MAX_DIMENSION || image_wide > JPEG_MAX_DIMENSION ||
      top >= image_high || left >= image_wide || high > image_high - top ||
      wide > image_wide - left)
    return NOT_BY_ME;
  /* A cut file does not end so (coded data never holds this pair): save the work. */
  if (size < 4 || data[size - 2] != 0xFF || data[size - 1] != JPEG_EOI) return NOT_BY_ME;

  struct jpeg_decompress_struct jpeg;
  Errors errors;
  memset(&jpeg, 0, sizeof jpeg);
  jpeg.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = leave;
  errors.base.emit_message = on_message;
  errors.base.output_message = be_quiet;
  if (setjmp(errors.leave)) {
    jpeg_destroy_decompress(&jpeg);
    return NOT_BY_ME;
  }
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, data, (unsigned long)size);
  int result = NOT_BY_ME;
  if (jpeg_read_header(&jpeg, TRUE) == JPEG_HEADER_OK && decodable(&jpeg, image_high, image_wide)) {
    jpeg.out_color_space = JCS_RGB;
    if (jpeg_start_decompress(&jpeg) && jpeg.output_components == 3) {
      read_rectangle(&jpeg, top, left, high, wide, out);
      if (ends_well(&jpeg, data + size)) result = DONE;
    }
  }
  jpeg_destroy_decompress(&jpeg);
  return result;
}
