// SPDX-License-Identifier: PostgreSQL
//! A broker's listeners over TLS: an authority that nobody else knows, a certificate for the broker and one for a client, and
//! a user with a password.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// Who may come with a password.
pub const USER: &str = "alice";
/// That password.
pub const PASSWORD: &str = "white-rabbit";

/// The authority's certificate, in a broker's folder.
pub(crate) const CA: &str = "ca.crt";
/// A client's certificate.
pub(crate) const CLIENT_CERTIFICATE: &str = "client.crt";
/// Its key.
pub(crate) const CLIENT_KEY: &str = "client.key";
/// The broker's key and certificate, in one file as Kafka wants them.
const BROKER: &str = "broker.pem";

/// Makes the authority and what it signs.
pub(crate) fn write_certificates(folder: &Path) {
    let key = KeyPair::generate().expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&key).expect("a certificate");
    let issuer = Issuer::new(parameters, key);
    let write = |name, text: &str| std::fs::write(folder.join(name), text).expect("a file");
    write(CA, &root.pem());
    let (certificate, key) = signed(&issuer, "broker", &["localhost", "127.0.0.1"]);
    write(BROKER, &(key + &certificate));
    let (certificate, key) = signed(&issuer, USER, &[]);
    write(CLIENT_CERTIFICATE, &certificate);
    write(CLIENT_KEY, &key);
}

/// A certificate and its key.
fn signed(issuer: &Issuer<'_, KeyPair>, name: &str, hosts: &[&str]) -> (String, String) {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut parameters = CertificateParams::new(hosts).expect("parameters");
    parameters.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().expect("a key");
    let certificate = parameters.signed_by(&key, issuer).expect("a certificate");
    (certificate.pem(), key.serialize_pem())
}

/// Lines of server.properties for the listeners SASL_SSL, which wants a password, and SSL, which wants a certificate.
pub(crate) fn settings(folder: &Path) -> String {
    let login = "org.apache.kafka.common.security";
    let sasl = "listener.name.sasl_ssl";
    format!(
        "sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512,PLAIN,OAUTHBEARER\n\
         {sasl}.scram-sha-256.sasl.jaas.config={login}.scram.ScramLoginModule required;\n\
         {sasl}.scram-sha-512.sasl.jaas.config={login}.scram.ScramLoginModule required;\n\
         {sasl}.plain.sasl.jaas.config={login}.plain.PlainLoginModule required user_{USER}=\"{PASSWORD}\";\n\
         {sasl}.oauthbearer.sasl.jaas.config={login}.oauthbearer.OAuthBearerLoginModule required \
         unsecuredLoginStringClaim_sub=\"{USER}\";\n\
         ssl.keystore.type=PEM\nssl.keystore.location={}\n\
         ssl.truststore.type=PEM\nssl.truststore.location={}\n\
         listener.name.ssl.ssl.client.auth=required\n",
        folder.join(BROKER).display(),
        folder.join(CA).display()
    )
}
