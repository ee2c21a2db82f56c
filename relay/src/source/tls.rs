// SPDX-License-Identifier: PostgreSQL
//! TLS towards PostgreSQL with libpq's meaning of `sslmode`, by rustls.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_cert::der::Decode as _;
use x509_cert::der::oid::db::{rfc4519, rfc5280};

use super::settings::{Roots, Settings, SslMode};

/// A certificate or key that cannot be used; the text names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

fn unusable<T>(path: &Path, what: &str, error: impl std::fmt::Display) -> Result<T, TlsError> {
    Err(TlsError(format!("{what} {}: {error}", path.display())))
}

/// The client's side of TLS for these settings.
pub fn client_config(settings: &Settings) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions: &[_] =
        if settings.tls13_only { &[&rustls::version::TLS13] } else { rustls::DEFAULT_VERSIONS };
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder =
        builder.with_protocol_versions(versions).map_err(|error| TlsError(format!("TLS: {error}")))?;
    let verifier = verifier(settings, provider)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match &settings.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate, "client certificate")?;
            let key_der = PrivateKeyDer::from_pem_file(key)
                .or_else(|error| unusable(key, "client key", format_args!("{error:?}")))?;
            builder
                .with_client_auth_cert(chain, key_der)
                .or_else(|error| unusable(certificate, "client certificate", error))?
        }
    };
    if settings.direct_tls {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    Ok(config)
}

fn certificates(path: &Path, what: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(list) if list.is_empty() => unusable(path, what, "it has no certificate in PEM form"),
        Ok(list) => Ok(list),
        Err(error) => unusable(path, what, error),
    }
}

fn verifier(settings: &Settings, provider: Arc<CryptoProvider>) -> Result<Arc<Verifier>, TlsError> {
    let trusted = match &settings.roots {
        _ if settings.sslmode < SslMode::VerifyCa => None,
        Roots::None => None,
        Roots::System => Some(rustls_native_certs::load_native_certs().certs),
        Roots::File(path) => Some(certificates(path, "root certificate")?),
    };
    let check = match trusted {
        None => None,
        Some(certificates) => {
            let mut store = RootCertStore::empty();
            store.add_parsable_certificates(certificates.iter().cloned());
            let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone());
            let webpki = webpki.build().map_err(|error| TlsError(format!("root certificates: {error}")))?;
            let any_name = settings.sslmode < SslMode::VerifyFull;
            Some(Check { webpki, trusted: certificates, any_name })
        }
    };
    Ok(Arc::new(Verifier { check, provider }))
}

/// Who the server has to be.
#[derive(Debug)]
struct Check {
    webpki: Arc<WebPkiServerVerifier>,
    trusted: Vec<CertificateDer<'static>>,
    any_name: bool,
}

impl Check {
    fn server(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<(), Error> {
        use CertificateError as E;
        match self.webpki.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Ok(_) => Ok(()),
            Err(Error::InvalidCertificate(E::NotValidForName | E::NotValidForNameContext { .. })) => {
                self.name(end_entity, name)
            }
            // The trusted certificate itself, as PostgreSQL's documentation makes it for a start: webpki has no such thing
            // as a server's certificate that is its own authority. It looks at the dates first.
            Err(
                error @ Error::InvalidCertificate(
                    E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. },
                ),
            ) => Err(error),
            Err(_) if self.trusted.iter().any(|trusted| trusted == end_entity) => {
                let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
                match rustls::client::verify_server_name(&parsed, name) {
                    Ok(()) => Ok(()),
                    Err(_) => self.name(end_entity, name),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// A name that webpki refuses: it may be the common name of a certificate without alternative names.
    fn name(&self, end_entity: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Error> {
        if self.any_name || common_name_matches(end_entity, &name.to_str()) {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::NotValidForName))
    }
}

fn common_name_matches(der: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(certificate) = x509_cert::Certificate::from_der(der) else { return false };
    let certificate = certificate.tbs_certificate;
    let alternative_names = certificate.extensions.iter().flatten();
    if alternative_names.into_iter().any(|extension| extension.extn_id == rfc5280::ID_CE_SUBJECT_ALT_NAME) {
        return false;
    }
    let attributes = certificate.subject.0.iter().flat_map(|name| name.0.iter());
    let mut common = attributes.filter(|attribute| attribute.oid == rfc4519::CN);
    common.any(|attribute| str::from_utf8(attribute.value.value()).is_ok_and(|common| matches(common, host)))
}

/// A common name with at most one wildcard, which stands for the first label.
fn matches(common: &str, host: &str) -> bool {
    match (common.strip_prefix("*."), host.split_once('.')) {
        (Some(domain), Some((label, rest))) => !label.is_empty() && domain.eq_ignore_ascii_case(rest),
        _ => common.eq_ignore_ascii_case(host),
    }
}

/// Checks signatures always, and the server's identity as far as the mode asks for it.
#[derive(Debug)]
struct Verifier {
    check: Option<Check>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(check) = &self.check {
            check.server(end_entity, intermediates, server_name, ocsp_response, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_one_label() {
        assert!(matches("db.example.org", "DB.example.org"));
        assert!(matches("*.example.org", "db.example.org"));
        for other in ["example.org", "a.db.example.org", ".example.org"] {
            assert!(!matches("*.example.org", other), "{other}");
        }
    }
}
