// Which machine the compiler writes code for.
#pragma once

// Defined in the pass for sm_90a. Every file is compiled for every architecture of the build; wgmma, bulk tensor copies and
// setmaxnreg exist on sm_90a alone, so a kernel that uses them has its whole body inside #ifdef RAT_HOPPER_CODE and is empty
// elsewhere. Its family's refuses() keeps such an empty kernel from being launched: it asks for a GPU of compute capability
// 9.0 and a build that has code for sm_90a (RAT_EXT_SM90).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RAT_HOPPER_CODE
#else
#pragma nv_diag_suppress 177  // "declared but never referenced": what only the bodies use
#endif
