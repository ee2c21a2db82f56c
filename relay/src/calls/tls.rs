// SPDX-License-Identifier: PostgreSQL
//! Whom calls over https trust.

use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// There is no way to do TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The library refuses.
    #[error("TLS: {0}")]
    Library(#[from] rustls::Error),
    /// The file with certificates of authorities cannot be used.
    #[error("{file}: {problem}")]
    Authorities {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Trusts whom the operating system trusts, and the authorities whose certificates are in `ca_file` (PEM).
pub fn client(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    let (usable, _) = roots.add_parsable_certificates(native.certs);
    if let Some(file) = ca_file {
        add_authorities(&mut roots, file)?;
    } else if usable == 0 {
        tracing::warn!(
            "the operating system has no certificates of authorities: https destinations will fail"
        );
    }
    let provider = rustls::crypto::ring::default_provider();
    let builder =
        ClientConfig::builder_with_provider(provider.into()).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn add_authorities(roots: &mut RootCertStore, file: &Path) -> Result<(), TlsError> {
    let wrong = |problem: String| TlsError::Authorities { file: file.display().to_string(), problem };
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))?;
    let mut found = 0;
    for certificate in certificates {
        roots
            .add(certificate.map_err(|error| wrong(error.to_string()))?)
            .map_err(|e| wrong(e.to_string()))?;
        found += 1;
    }
    if found == 0 { Err(wrong("there is no certificate in it".into())) } else { Ok(()) }
}
