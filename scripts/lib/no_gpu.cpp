// CPU builds of PyTorch know no CUDA device at all: one whose guard does nothing, for tensors without memory.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
