//! The binary: all of it is [`portcullis::cli`].

fn main() -> std::process::ExitCode {
    portcullis::cli::main()
}
