// The vectors that this translation unit computes with: Isa of the header that TOKENSWIFT_VECTORS names. A variant's
// source file defines the macro before it includes anything. All else that computes with vectors includes this header.
//
// All code of a variant has internal linkage, plain inline functions included. Otherwise the linker would keep one of
// several copies for all variants, and that one could use instructions that the machine does not have.
#pragma once

#ifndef TOKENSWIFT_VECTORS
#define TOKENSWIFT_VECTORS "isa/vec_generic.h"
#endif

#include TOKENSWIFT_VECTORS
