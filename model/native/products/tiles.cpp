#include "products/tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace emoe {
namespace {

// Asks the kernel to let this process use tiles, whose state is large. Threads that begin later may use them too.
bool ask() {
#if defined(EMOE_EMULATED_TILES)
    return true;
#elif defined(EMOE_TILES)
    constexpr int kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM of asm/prctl.h, and a number of the CPU
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

const bool allowed = ask();

} // namespace

bool tiles_used = allowed;

} // namespace emoe

// Returns whether products are computed by the matrix unit. Before that, turns it on if `wanted` is 1 and it may be used,
// and off if `wanted` is 0, for tests; any other value changes nothing.
extern "C" int emoe_tiles(int wanted) {
    if (wanted == 0 || wanted == 1) emoe::tiles_used = wanted == 1 && emoe::allowed;
    return emoe::tiles_used;
}
