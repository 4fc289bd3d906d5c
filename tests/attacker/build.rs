//! How a kernel is linked: no start files, no libraries, at fixed addresses, with an entry of its own.

fn main() {
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--entry=entry",
        "-Wl,--build-id=none",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=src/boot.s");
}
